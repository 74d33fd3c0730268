def analyse(folder):
    return []
