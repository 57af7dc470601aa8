"""The page that `cv_jax.tools.report` writes: what is read, drawn, asked of the network, and told.

run.py reads work directories, network.py asks the trained network, picture.py and markup.py make
HTML of pictures and texts, and page.py, with examples.py and page.css, is the page.
"""
