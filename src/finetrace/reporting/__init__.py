"""Reporting: terminal tables, figures and the report page."""
