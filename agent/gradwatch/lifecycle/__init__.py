"""Life cycle of agents in a process: facts about the process, notes to ``gradwatch run``, shutdown."""
