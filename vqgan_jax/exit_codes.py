"""How a process says why it ended; docs/survival.md tells users, and what launchers do about each."""

USER_ERROR = 2  # a mistake of the user: starting again changes nothing
PREEMPTED = 42  # told to go, and saved
LOST = 134  # other hosts are gone, or stuck; the code of JAX's own aborts
STORAGE = 200  # a disk or bucket did not answer for long; xpk restarts on nothing below 127 but 42
