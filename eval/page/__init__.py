"""An evaluation as one HTML or Markdown page."""
