"""Where rows come from: files, directories, tables and the hub."""
