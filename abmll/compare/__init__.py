"""Comparisons of methods: a grid of ordinary runs, their scores, and what they say together."""
