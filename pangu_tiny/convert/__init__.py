"""Models of other projects' layouts, in and out."""
