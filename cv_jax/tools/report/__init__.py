"""Builds the page that `cv_jax.tools.report` writes.

run.py reads work directories, network.py computes predictions and features, picture.py and
markup.py turn pictures and texts into HTML, and page.py builds the page, with examples.py and
page.css.
"""
