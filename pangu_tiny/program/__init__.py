"""What is compiled: steps, loss, optimizer. Needs a shape, a mesh and marks, and no folder."""
