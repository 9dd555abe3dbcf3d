"""Checks as JUnit XML, which CI systems show as test results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from compress.atomic import new_file
from compress.report.model import Check

FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # not in XML 1.0


def junit_xml(suite: str, checks: Sequence[Check], fault: str | None = None) -> str:
    """One test suite with a test case for each check, and one in error where the run ended with a fault."""
    failed = sum(check.passed is False for check in checks)
    skipped = sum(check.passed is None for check in checks)
    counts = {
        "tests": str(len(checks) + (fault is not None)),
        "failures": str(failed),
        "errors": str(int(fault is not None)),
        "skipped": str(skipped),
    }
    root = ElementTree.Element("testsuites", counts)
    parent = ElementTree.SubElement(root, "testsuite", {"name": clean(suite), **counts})
    for check in checks:
        case = ElementTree.SubElement(parent, "testcase", {"classname": clean(suite), "name": clean(check.name)})
        if check.passed is None:
            ElementTree.SubElement(case, "skipped", {"message": clean(check.message)})
        elif not check.passed:
            failure = ElementTree.SubElement(case, "failure", {"message": clean(check.message), "type": "gate"})
            failure.text = clean(f"wanted: {check.wanted}\nmeasured: {check.measured}")
        else:
            ElementTree.SubElement(case, "system-out").text = clean(f"{check.wanted}; {check.measured}")
    if fault is not None:
        case = ElementTree.SubElement(parent, "testcase", {"classname": clean(suite), "name": "run"})
        ElementTree.SubElement(case, "error", {"message": clean(fault), "type": "fault"}).text = clean(fault)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def clean(text: str) -> str:
    """The text without characters that XML cannot hold."""
    return FORBIDDEN.sub("�", text)


def write_junit(path: str | Path, suite: str, checks: Sequence[Check], fault: str | None = None) -> None:
    """Write the suite to a file. Raises OutputError."""
    with new_file(path) as draft:
        draft.write_text(junit_xml(suite, checks, fault), encoding="utf-8")
