"""Recipes from the config files of other training tools."""
