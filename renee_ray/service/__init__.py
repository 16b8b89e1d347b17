"""Everything that runs on Ray; the only room that imports it."""
