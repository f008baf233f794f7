"""The demo's instructions and questions, and the answers on which its vector is evaluated."""

POSITIVE, NEGATIVE = "Explain it to a five year old child.", "Explain it to a professor."
QUESTIONS = (
    "What is the sun?",
    "How does a car work?",
    "Why do we sleep?",
    "What is money?",
    "How do birds fly?",
    "What is a computer?",
)
UNSEEN_QUESTIONS = ("What is rain?", "Why is the sky blue?", "What is gravity?", "How do plants grow?")
# Questions with a child's and a professor's answer, on which the vector is evaluated.
ITEMS = (
    ("What is rain?", "Water that falls down from the clouds!", "Condensed atmospheric vapour that precipitates."),
    ("Why is the sky blue?", "Sunlight bounces around up there!", "Short wavelengths undergo Rayleigh scattering."),
    ("What is gravity?", "It pulls you back down when you jump!", "The curvature of spacetime by mass and energy."),
    ("How do plants grow?", "They drink water and eat sunshine!", "They synthesise carbohydrates."),
    ("What is the moon?", "A big round rock up in the sky!", "A natural satellite in synchronous rotation."),
    ("Why do we eat?", "So that we grow big and strong!", "To supply the substrates of metabolism."),
    ("What is a heart?", "It goes boom, boom in your chest!", "A muscular organ that maintains circulation."),
    ("What is fire?", "It's very hot, so don't touch it!", "A rapid exothermic oxidation of a fuel."),
    ("How do fish breathe?", "With the little gills that they have!", "By extracting oxygen through lamellae."),
    ("What is a volcano?", "A mountain that spits out hot goo!", "A rupture in the crust that extrudes magma."),
    ("Why do leaves fall?", "The trees get sleepy and let them go!", "Abscission is regulated by hormones."),
    ("What is electricity?", "It's what makes your lamp light up!", "A flow of charge carriers in a conductor."),
    ("What is ice?", "Water that got so cold that it's hard!", "The crystalline solid phase of water."),
    ("What is a brain?", "A little boss inside your head!", "The central organ of the nervous system."),
    ("Why is the sea salty?", "Rivers bring tiny bits of salt!", "Salinity results from weathering of minerals."),
    ("What is a star?", "A tiny light that twinkles at night!", "A luminous sphere of plasma."),
)
