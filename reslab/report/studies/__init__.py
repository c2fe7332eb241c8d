"""One file a study: its records -> figures. Each has `figures(records)`."""
