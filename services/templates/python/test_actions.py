import unittest

from actions import Refusal, greet


class Greet(unittest.TestCase):
    def test_greets(self):
        lines = []
        self.assertEqual(greet({"name": "Ada"}, lines.append), {"text": "Hello, Ada!"})
        self.assertEqual(lines, ["greeting Ada"])

    def test_refuses(self):
        for person, code in [({"name": ""}, "NAME_EMPTY"), (None, "INVALID_ARGUMENTS")]:
            with self.assertRaises(Refusal) as refused:
                greet(person, print)
            self.assertEqual(refused.exception.code, code)
