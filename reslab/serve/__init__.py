"""A classifier over HTTP, and its page."""
