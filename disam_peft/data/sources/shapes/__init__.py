"""DomainShapes: a benchmark of twelve shapes in six styles that is painted on demand, without a download.

Every image is a pure function of (seed, split, domain, class, index), computed in whole numbers: the same bytes on
every machine. ``source.py`` makes samples of it; ``scene.py`` draws one image.
"""
