"""Files that survive: written whole or not at all (storage), by one process at a time (locks), and those of others read
without running them (foreign, archives)."""
