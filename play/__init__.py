"""A local page that looks inside a trained agent and plays in its dream (``python -m play``)."""

from hidreamer import app

if __name__ == "play":  # not hidreamer.root.play
    app.enter()  # before the current folder, which may have a tools.py of its own
