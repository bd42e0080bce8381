"""What the paper reports (arXiv 2404.06170, section III): the figures that ours stand beside."""

# As the paper calls its teachers, and as the hub does, without the owner.
TEACHERS = {
    "Base-16": "vit-base-patch16-224-in21k",
    "Large-16": "vit-large-patch16-224-in21k",
    "Base-32": "vit-base-patch32-224-in21k",
    "Large-32": "vit-large-patch32-224-in21k",
}
# Table I: layers, width, heads, MLP.
STUDENT_SIZES = {"base": (6, 256, 8, 1024), "large": (10, 512, 8, 2048)}
TEACHER_SIZES = {"Base": (12, 768, 12, 3072), "Large": (24, 1024, 16, 4096)}
# Table II, student base at 32 px: accuracy of Embed-KD and Teacher-KD in percent.
BASE_STUDENT = {
    "Base-16": (49.32, 51.68),
    "Large-16": (49.67, 51.92),
    "Base-32": (49.34, 52.61),
    "Large-32": (50.33, 51.95),
}
# The same table: how much less memory the embeddings take than the teacher.
WEIGHT_RATIOS = {"Base-32": 17, "Large-32": 59}
# Table III: student, image size in pixels, teacher; accuracy of Embed-KD in percent.
LARGER = {
    ("base", 64, "Large-16"): 53.28,
    ("large", 32, "Large-16"): 52.92,
    ("large", 64, "Large-16"): 54.36,
    ("base", 64, "Large-32"): 53.40,
    ("large", 32, "Large-32"): 52.77,
    ("large", 64, "Large-32"): 54.92,
}
# The abstract, of figure 2: how much less memory and time Embed-KD takes than Teacher-KD.
MEMORY_RATIO, TIME_RATIO = 9, 8
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # figure 3
