"""placeholder"""

NAMES = ()
