_base_ = '../_base_/rambo.py'
