"""finetrace: which training examples made my fine-tuned language model say that, and can I trust the answer?"""
