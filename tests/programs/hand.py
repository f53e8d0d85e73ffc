"""Every hand-written form: what tests run and docs/supported.md shows."""

from programs import arithmetic, codes, factors, in_place, layout, products, refused, scales, sharing

SECTIONS = (codes, layout, scales, factors, arithmetic, in_place, sharing, products, refused)
FORMS = [form for section in SECTIONS for form in section.FORMS]
