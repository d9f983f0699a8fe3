"""Recurrent language models behind one interface (`backbones.base.LanguageModel`)."""
