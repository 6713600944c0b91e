"""hidreamer: DreamerV3 with a latent state that is chosen by config.

Floors (a file imports only from lower ones):
0 ``nets distributions returns optim replay spaces`` and more; 1 ``quantizer transformer mask``;
2 ``dynamics.base``; 3 ``dynamics.rssm hrssm hrvq``; 4 ``dynamics``.
"""

__version__ = "0.1.0"
