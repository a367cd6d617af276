"""Code that draws arrays and run folders: boxes, curves, GIFs, result tables. It trains nothing."""
