"""Recurrent language models behind one interface (`backbones.base.RecurrentLM`)."""
