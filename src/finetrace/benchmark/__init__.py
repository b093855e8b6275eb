"""The paper's benchmark: tasks x protocols x methods x seeds, resumable, with controls and intervals."""
