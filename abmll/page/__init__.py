"""Runs as a self-contained HTML page.

facts.py reads a run's folder < measures.py posterior.py count < charts.py draws, svg.py makes it inline < command.py
fills template.html.j2.
"""
