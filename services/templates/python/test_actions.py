import unittest

from actions import greet
from mb_service import Failure, mock


class Greet(unittest.TestCase):
    def setUp(self):
        mock.reset()

    def test_greets(self):
        self.assertEqual(greet({"name": "Ada"}), {"text": "Hello, Ada!"})
        self.assertEqual(mock.lines, ["info: greeting Ada"])

    def test_refuses(self):
        for person, code in [({"name": ""}, "NAME_EMPTY"), (None, "INVALID_ARGUMENTS")]:
            with self.assertRaises(Failure) as refused:
                greet(person)
            self.assertEqual(refused.exception.code, code)
