"""From a folder, archive, table or hub data set to batches of images with a class and a domain each.

Read ``dataset.py`` first, then ``load.py``; ``sources/`` reads, ``transforms/`` decodes and varies images, ``stores/``
keeps them decoded or encoded, ``loading/`` makes batches.
"""
