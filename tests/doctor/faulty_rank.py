"""One of doctor's two processes with a fault: sums of losses are not added up over the ranks (the variance and the
mean are those of each rank alone)."""

import sys

from disam_peft.doctor import ranks
from disam_peft.sharpness.ranks import Ranks

Ranks.all_sums = lambda self, sums: sums
ranks.main(sys.argv[1:])
