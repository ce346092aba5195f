"""Every setting of a recipe, as strict and frozen pydantic models. Imports pydantic and PyYAML alone, so it is quick.

Read ``recipe.py`` first; the other files mirror the folders that they configure.
"""
