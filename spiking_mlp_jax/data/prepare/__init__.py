"""Image archives and folders as ArrayRecord files."""
