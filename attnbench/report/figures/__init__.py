"""The figures of a report, one a module. Each function takes panels and a style and returns a matplotlib `Figure`.

None is returned where there is nothing to draw. READ says how to read a figure, for the page.
"""
