"""The checker of the import hook: beartype, taking an int where a float is asked for, as PEP 484 does."""

from beartype import BeartypeConf, beartype

tower = beartype(conf=BeartypeConf(is_pep484_tower=True))
