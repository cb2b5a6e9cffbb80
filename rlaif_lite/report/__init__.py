"""The run folder on one page that a person reads. Imports nothing else of the project but its errors."""
