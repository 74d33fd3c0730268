"""Comparisons between methods: a grid of runs, and what their scores say."""
