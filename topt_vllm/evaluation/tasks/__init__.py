"""Tasks after RULER (arXiv 2404.06654), made from the evaluated text: questions with one right answer."""
