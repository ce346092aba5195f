"""What several tests share: tiny models, image folders, hostile files, and the programs that tests start as processes.

Read first: ``tiny`` (checkpoints), ``folders`` (data) and ``adapter_cells`` (classifiers)."""
