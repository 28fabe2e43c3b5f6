"""What a model can do: answers to questions. (Held-out losses are measured by the ranks that
train, in dtrain/stages/step.py.)
"""
