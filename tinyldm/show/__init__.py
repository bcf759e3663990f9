"""What people look at: grids of images, curves of a run, maps of attention."""
