"""What every paper shares: arrays, gradients, kernels, data, the training loop."""
