"""Reports, model cards, tables and plots of measured results."""
