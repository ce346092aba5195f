"""``python -m disam_peft.cli`` is ``disam-peft``. Launchers (torchrun, accelerate launch) start this module."""

from disam_peft.cli.app import main

main()
