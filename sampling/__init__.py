"""Networks → images: the samplers and their table, random streams, the files and the record of a run."""
