import unittest

from actions import Refusal, summary


class Summary(unittest.TestCase):
    def test_of_many(self):
        found = summary([4, 1, 3, 2], 4)
        self.assertEqual(found["mean"], 2.5)
        self.assertEqual(found["median"], 2.5)
        self.assertEqual(found["quantiles"], [1.75, 2.5, 3.25])
        self.assertEqual((found["count"], found["least"], found["most"]), (4, 1, 4))

    def test_of_one(self):
        self.assertEqual(summary([7], 4)["quantiles"], [7, 7, 7])

    def test_refusals(self):
        for values, code in [([], "EMPTY"), ("1", "INVALID_ARGUMENTS"), ([True], "INVALID_ARGUMENTS")]:
            with self.assertRaises(Refusal) as refused:
                summary(values, 4)
            self.assertEqual(refused.exception.code, code)
