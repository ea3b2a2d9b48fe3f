"""Reports, model cards and tables of figures."""
