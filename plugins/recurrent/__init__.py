"""Recurrent variants, one a file, on what `recurrence` says once for all of them."""
