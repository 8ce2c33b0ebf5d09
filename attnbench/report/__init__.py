"""Figures and pages drawn from records: `page` is the door."""
