"""``python -m disam_peft.cli`` is ``disam-peft``: for launchers that start a module on every process."""

from disam_peft.cli.app import main

main()
